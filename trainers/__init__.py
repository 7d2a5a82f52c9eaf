"""Who decides: the RL loop, reward-model training, scoring, the demo."""
