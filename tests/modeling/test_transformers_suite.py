"""What `transformers_suite` does where the source distribution cannot be fetched."""

import sys

import pytest

import transformers_suite
from support.samples import SampleError


@pytest.fixture
def offline(monkeypatch):
    def fail(package, version):
        raise SampleError(f"{package}=={version} could not be fetched")

    monkeypatch.setattr(transformers_suite, "fetch_source_distribution", fail)
    monkeypatch.delitem(sys.modules, transformers_suite._PACKAGE, raising=False)


def test_offline_the_module_is_skipped(offline, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="transformers==.* could not be fetched"):
        transformers_suite.load("test_modeling_common")


def test_offline_continuous_integration_fails(offline, monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(SampleError, match="transformers==.* could not be fetched"):
        transformers_suite.load("test_modeling_common")
