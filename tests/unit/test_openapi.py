"""docs/openapi.json is what the API says of itself."""

from scripts.openapi import PAGE, document


def test_the_documented_contract_is_that_of_the_code() -> None:
    assert PAGE.read_text() == document(), "out of date: python -m scripts.openapi"
