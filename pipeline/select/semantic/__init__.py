"""Find semantic repeats: cosine of embeddings within clusters (SemDeDup).

clusters: the search, by threads of one process
on_workers: the same, for embeddings that stay on workers
"""
