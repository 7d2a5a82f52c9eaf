"""What is loaded: tokenizer and chat template, models, trunk and heads, data adapters."""
