"""Whatever proposes tokens: the Dovetail drafter, n-grams, small models; their training lives in ``drafters.train``."""
