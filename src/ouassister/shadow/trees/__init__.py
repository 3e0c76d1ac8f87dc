"""The guest's /sys and /dev in a shadow: handed over, mounted once, seen by all programs.

host side    collect.collect   from memory, while the shadow is built
             handover.write    a file for each, in the run's folder
supervisor   serve.serve       mounts each on the stage, with a server of its own
runner       serve.served      what `ouassister.shadow.sandbox.tree` binds into a program's tree
"""
