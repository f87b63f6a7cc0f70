"""Sphinx extension: buttons that open a chapter on Colab or Binder, and the repository, from one setting.

    repository: {url: "", branch: main}

An empty address, the default, means no button on any page. The theme's own launch buttons are not used: they point at the page's
source, which for a chapter is the executed copy that no repository holds.
"""

from typing import Any
from urllib.parse import quote, urlsplit

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ExtensionError

DEFAULTS = {"url": "", "branch": "main"}
EXECUTED = "executed/"
COLAB, BINDER = "https://colab.research.google.com", "https://mybinder.org"


def setup(app: Sphinx) -> dict[str, Any]:
    """Declare the setting and connect; called by Sphinx."""
    app.add_config_value("repository", DEFAULTS, "html", [dict])
    app.connect("config-inited", _check)
    app.connect("html-page-context", _add_buttons, priority=502)  # the theme makes its list of buttons at 501
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _check(_app: Sphinx, config: Config) -> None:
    """Complete the setting, or say what is wrong with it."""
    unknown = set(config.repository) - set(DEFAULTS)
    if unknown:
        msg = f"repository must have the keys url and branch only. Got {', '.join(sorted(unknown))}."
        raise ExtensionError(msg)
    setting = DEFAULTS | config.repository
    setting["url"] = setting["url"].strip().rstrip("/").removesuffix(".git")
    if setting["url"] and not (urlsplit(setting["url"]).scheme == "https" and len(_path(setting["url"]).split("/")) >= 2):
        msg = f"repository.url must be empty or like https://github.com/OWNER/NAME. Got {setting['url']!r}."
        raise ExtensionError(msg)
    config.repository = setting


def _path(url: str) -> str:
    return urlsplit(url).path.strip("/")


def launch_urls(url: str, branch: str, path: str) -> dict[str, str]:
    """Addresses that open a file of a repository: by name of the service, as far as the service knows the host.

    Args:
        url: Address of the repository.
        branch: Its branch or tag.
        path: Path of the notebook from the repository's top.
    """
    host, name = urlsplit(url).hostname, _path(url)
    branch, path = quote(branch, safe=""), quote(path)
    places = {"github.com": f"gh/{name}", "gitlab.com": f"gl/{quote(name, safe='')}"}
    place = places.get(host or "", f"git/{quote(url, safe='')}")
    found = {"Binder": f"{BINDER}/v2/{place}/{branch}?urlpath={quote(f'lab/tree/{path}', safe='/')}"}
    if host == "github.com":
        found["Colab"] = f"{COLAB}/github/{name}/blob/{branch}/{path}"
    return found


def _add_buttons(app: Sphinx, page: str, _template: str, context: dict[str, Any], _doctree: Any) -> None:
    """Put the buttons at the head of a page; nothing without an address."""
    setting = app.config.repository
    if not setting["url"]:
        return
    buttons = context.setdefault("header_buttons", [])
    if page.startswith(EXECUTED):
        urls = launch_urls(setting["url"], setting["branch"], f"notebooks/{page.removeprefix(EXECUTED)}.ipynb")
        icons = {"Binder": "_static/images/logo_binder.svg", "Colab": "_static/images/logo_colab.png"}
        entries = [
            {"type": "link", "text": name, "tooltip": f"Open this chapter on {name}", "icon": icons[name], "url": address}
            for name, address in urls.items()
        ]
        buttons.append({
            "type": "group", "tooltip": "Run this chapter elsewhere", "icon": "fas fa-rocket", "buttons": entries,
            "label": "launch-buttons",
        })  # fmt: skip
    buttons.append({
        "type": "link", "url": setting["url"], "tooltip": "Source repository", "text": "", "icon": "fas fa-code-branch",
        "label": "source-repository-button",
    })  # fmt: skip
