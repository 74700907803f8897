"""What the estimators of domain weights share: small models trained on mixes of the corpus."""
