"""The verifiable instructions of IFEval (Zhou et al., arXiv 2311.07911), one small check each, by their official ids.

Written from the published definitions. Where those say nothing, the checks decide as the published code does, with
these repairs: keywords, section marks and postscript markers are taken literally, not as regular expressions; a
paragraph that is blank is not counted when the n-th is looked for; a capitalised contraction (`DON'T`) is one word;
the language of a text in capitals is told from its lower-case form; and a check whose arguments are missing is refused
instead of given random ones.
"""
