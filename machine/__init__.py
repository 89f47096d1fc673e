"""Where a run takes place: devices, processes, compiler, disk, console."""
