"""The reward server's page for people: completions in, shaded tokens, scores, components and advantages out.

It asks the same functions as the API's routes do; nothing is computed here. Every page is whole without JavaScript.
"""
