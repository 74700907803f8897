"""The control of domain weights: what each method is worth against uniform and proportional shares."""
