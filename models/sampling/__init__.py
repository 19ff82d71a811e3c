"""How a model is sampled: schedules, orders, options, and the loop that reveals tokens step by step."""
