"""Domain weights that are estimated while a model trains: DoReMi, DoGE and Aioli."""
