"""App configurations: what Microdroid needs around a payload from an APK (docs/apps.md).

What stands in an APK was written by anybody. It is read within bounds, and no path of it is opened but by
``open_extra_apks``, which clients call.
"""
