"""Who computes: rollout (vLLM), reward, reference, learner (DeepSpeed).

Plain Python classes, built directly in tests; `cluster.spawn` makes Ray actors of them.
"""
