"""`capstan plan-cost`: what each stage of a recipe costs at any number of rows, before anything is run"""
