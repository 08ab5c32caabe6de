"""The command `lisatune`: parse, call, print."""

from lisatune.cli.app import main as main
