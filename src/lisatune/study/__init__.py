"""What training does to each layer of a model, measured to choose which blocks LISA draws."""

from lisatune.study.norms import study_norms as study_norms
from lisatune.study.outliers import study_outliers as study_outliers
