"""A look at a recipe before it trains: would its reward teach the model what is right? (docs/preflight.md)"""
