"""How `make lab` saves a notebook: an explorer's picture instead of a link to a live panel.

A panel lives as long as its kernel. In a saved notebook the link to it leads nowhere the next day,
and JupyterLab would show "model not found" in place of the picture that is stored beside it.
"""

LINK = "application/vnd.jupyter.widget-view+json"
SHOWN = ("image/png", "text/html")  # what a viewer without a kernel can show


def keep_pictures(model, **_):
    """Takes the links out of a notebook that is about to be written (a dict, changed in place)."""
    if model["type"] != "notebook" or not model["content"]:
        return
    for cell in model["content"]["cells"]:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if any(kind in data for kind in SHOWN):
                data.pop(LINK, None)


c.ContentsManager.pre_save_hook = keep_pictures  # noqa: F821 (Jupyter calls its configuration c)
