"""Tests of vmactor."""
