"""Only files of tests hold tests here, or can be imported without mistral-common."""

collect_ignore_glob = ["[!t]*.py"]
