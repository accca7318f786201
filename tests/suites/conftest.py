import pytest
import suite_checkouts


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    return suite_checkouts.write(tmp_path_factory.mktemp("checkout"))
