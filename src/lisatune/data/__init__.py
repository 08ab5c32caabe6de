"""From records to batches."""

from lisatune.data.records import read_records as read_records
from lisatune.data.tokens import tokenize as tokenize
