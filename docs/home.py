"""The README is the first page of the documentation, with its links relative to docs/."""

import re
from pathlib import Path

from mkdocs.structure.files import File


def on_files(files, config):
    text = (Path(config.docs_dir).parent / "README.md").read_text()
    text = text.replace("](docs/", "](")
    # The site has no page for other files of the repository.
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!\w+\.md|https?:)[^)]*\)", r"\1", text)
    text = text.replace("[CONTRIBUTING.md](CONTRIBUTING.md)", "CONTRIBUTING.md")
    files.append(File.generated(config, "index.md", content=text))
    return files
