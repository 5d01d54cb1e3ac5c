"""Everything that makes a dataset: public ones from their official files (`python -m datasets.prepare`), and `shapes`.

`download` fetches and unpacks archives; `sbd`, `coco14` and `deepglobe` convert what is in them; `shapes` draws a set.
"""
