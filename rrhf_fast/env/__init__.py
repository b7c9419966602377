"""What a bug report needs: versions, devices and settings of this machine."""
