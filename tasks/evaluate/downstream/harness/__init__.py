"""lm-eval tasks over local files: NAME.yaml, and the document preprocessing that one names with `!function`."""
