"""Captions for folders of pictures: written (`captioners`, `embedded`), filtered (`filter`), kept (`table`, `journal`).

`run.caption` is what ``mahlstick caption`` does.
"""
