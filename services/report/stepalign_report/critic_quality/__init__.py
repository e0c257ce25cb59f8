"""The worth of a critic, measured against people's labels of the first wrong step.

``rows`` keeps the answers, ``asking`` gets them, ``judged`` reads the called place out of them, ``figures`` counts, and
``summary``, ``tables`` and the report's page show. docs/critic-quality.md defines every figure.
"""
