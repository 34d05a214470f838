"""What was learned, for people: tables, figures, and one page that needs nothing else.

Everything here reads plain results (`results.json`, the round records, the hyperparameter rows) and no model.
"""
