package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// memos is a folder with a symbolic link for each loop device that this package has attached, named by its disk
// sequence. Its text is what the kernel tells of the device only after it has looked at the backing file: that may
// hang, or fail for ever when the process behind a FUSE mount has ended; then nobody would know any more whose the device is. The folder
// is in /dev, which lives exactly as long as the devices do, and a link is made once and never changed.
const memos = "/dev/quarry-loops"

// memo renders what never changes during a device's life. The boot is in it because sequences begin anew with each.
func (lp Loop) memo() (string, bool) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return fmt.Sprintf("%s %d %d %d %s", strings.TrimSpace(string(boot)), lp.Dev, lp.Inode, lp.RDev, lp.Mark), err == nil && lp.sequence != ""
}

// remember makes a device's memo. Without one it is asked as before.
func (lp Loop) remember() {
	text, ok := lp.memo()
	if !ok {
		return
	}
	_ = os.Mkdir(memos, 0o700)
	_ = os.Symlink(text, filepath.Join(memos, lp.sequence))
}

// recall fills in what the memo of a device says. ok is false where there is none, or one that is not to be believed.
func (lp Loop) recall() (_ Loop, ok bool) {
	if lp.sequence == "" {
		return lp, false
	}
	text, err := os.Readlink(filepath.Join(memos, lp.sequence))
	if err != nil {
		return lp, false
	}
	f := strings.SplitN(text, " ", 5)
	if len(f) != 5 {
		return lp, false
	}
	if _, err := fmt.Sscan(strings.Join(f[1:4], " "), &lp.Dev, &lp.Inode, &lp.RDev); err != nil {
		return lp, false
	}
	lp.Mark = f[4]
	again, ok := lp.memo()
	return lp, ok && again == text
}

// forget removes the memo of a device that is gone.
func (lp Loop) forget() {
	if lp.sequence != "" {
		_ = os.Remove(filepath.Join(memos, lp.sequence))
	}
}

// memosNow names the memos. Only those that were there before the devices were listed are to be
// swept: another attachment makes device and memo at any time.
func memosNow() []os.DirEntry {
	all, err := os.ReadDir(memos)
	if err != nil {
		return nil
	}
	return all
}

// sweepMemos removes those of devices that went by themselves, with their last user.
func sweepMemos(all []os.DirEntry, living []Loop) {
	if len(all) <= len(living) {
		return
	}
	there := map[string]bool{}
	for _, lp := range living {
		there[lp.sequence] = true
	}
	for _, e := range all {
		if !there[e.Name()] {
			_ = os.Remove(filepath.Join(memos, e.Name()))
		}
	}
}
