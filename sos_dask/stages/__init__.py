"""The stages: each binds a kernel to catalogs on disk and to the cluster.

Every stage is a class of one shape (`stages.base.Stage`): inputs by role, settings, and what it
makes of them in a directory. A complete output is left alone; an unfinished one is finished.
"""
