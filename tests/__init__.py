"""Tests in the folders of what they test; helpers stand beside those that use them."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
