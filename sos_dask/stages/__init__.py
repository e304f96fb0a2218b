"""The stages: each binds a kernel to catalogs on disk and to the cluster.

Every stage is one documented function that takes catalogs (or files), an output directory,
settings and a `Cluster`, and returns the `Manifest` of what it wrote. Its ``*_recipe`` says
beforehand what it would write. A complete output is left alone; an unfinished one is finished.
"""
