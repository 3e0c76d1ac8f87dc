"""The guest's /sys and /dev in a shadow: handed over, mounted once, seen by all programs.

host side    collect.devices   /dev, from memory, while the shadow is built
             collect.system    /sys, when the first program looks there: few do
             handover          a file for each, in the run's folder
supervisor   serve.serve       mounts each on the stage, with a server of its own
runner       sandbox.tree      binds them into a program's tree
"""
