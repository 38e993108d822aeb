package hosttest

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestAFilesystemIsThereForItsTestOnly(t *testing.T) {
	for fstype, magic := range map[string]int64{
		"ext4": unix.EXT4_SUPER_MAGIC, "xfs": unix.XFS_SUPER_MAGIC, "btrfs": unix.BTRFS_SUPER_MAGIC,
	} {
		var dir string
		t.Run(fstype, func(t *testing.T) {
			dir = Filesystem(t, fstype, 16<<20)
			var st unix.Statfs_t
			if err := unix.Statfs(dir, &st); err != nil || int64(st.Type) != magic {
				t.Fatalf("statfs: type %#x, want %#x, error %v", st.Type, magic, err)
			}
			if err := os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
		})
		if dir != "" {
			if _, err := os.Stat(dir); !os.IsNotExist(err) {
				t.Errorf("%s is left behind: %v", dir, err)
			}
		}
	}
}
