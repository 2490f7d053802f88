"""Reinforcement learning:"""
