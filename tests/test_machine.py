from granvit.machine import commit


def test_without_git_the_commit_is_what_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # nothing in it
    monkeypatch.setenv("GRANVIT_COMMIT", "abc1234")
    assert commit() == "abc1234"
    monkeypatch.delenv("GRANVIT_COMMIT")
    assert commit() == "unknown"
