"""Human judgement. So far: the demo's simulated assessor."""
