"""Solutions whose first wrong step people have labelled, from files of several data sets.

:mod:`.formats` lists the forms of rows, one module each; :mod:`.loading` reads files, folders and the Hugging Face hub.
"""

from stepalign_run.data.labelled import LabelledSolution, in_half
from stepalign_run.data.loading import LabelledData, load_labelled

__all__ = ["LabelledData", "LabelledSolution", "in_half", "load_labelled"]
