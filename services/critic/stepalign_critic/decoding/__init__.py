"""Aligned decoding: what a critic may write about an attempt, so that its critique cannot be unaligned.

:mod:`.plan` knows the attempt and the prompt set's layout. It gives the *draft*, the answer that calls every step
right; an engine reads its log-probabilities in one forward pass. From them the plan chooses the place of the first
error, or none, and says what the critic is still to write there, as a grammar. :mod:`.grammar` writes grammars for
engines.
"""
