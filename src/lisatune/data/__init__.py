"""From files of records to batches of tokens."""

from lisatune.data.records import read_records as read_records
from lisatune.data.tokens import tokenize as tokenize
