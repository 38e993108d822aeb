package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// outliving is the control group of processes that go on when Quarry ends, below the root of the hierarchy.
const outliving = "quarry-outliving"

// The numbers that the kernel gives the first PID and cgroup namespaces; see PROC_PID_INIT_INO in linux/proc_ns.h.
const (
	firstPIDNamespace    = 0xEFFFFFFC
	firstCgroupNamespace = 0xEFFFFFFB
)

// Outlive moves a process that workloads need out of this process's control group (version 2): whoever ends
// a container or a service kills everything in its group. It returns in words what the process ends with all the
// same, "" if with nothing: that is no reason to do without it, but one to tell an operator.
func (l *Local) Outlive(pid int) (bound string) {
	if n, err := namespaceOf("pid"); err != nil || n != firstPIDNamespace {
		return "it has process IDs of its own, as a container without \"hostPID: true\": all its processes end with the first one"
	}
	if n, err := namespaceOf("cgroup"); err != nil || n != firstCgroupNamespace {
		return "its control groups are not the host's, as in a container that is not privileged: all its processes end with it"
	}
	group, err := cgroupOf(pid)
	if err != nil {
		return fmt.Sprintf("it may have a control group: %v", err)
	}
	if group == "" || group == "/" || strings.HasPrefix(group, "/"+outliving) {
		return ""
	}
	if err := l.leave(pid); err != nil {
		return fmt.Sprintf("the control group %s: it cannot be left: %v", group, err)
	}
	return ""
}

func namespaceOf(kind string) (uint64, error) {
	var st unix.Stat_t
	err := unix.Stat("/proc/self/ns/"+kind, &st)
	return st.Ino, err
}

// cgroupOf is a process's group in the hierarchy of version 2; "" where there is none.
func cgroupOf(pid int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if group, ok := strings.CutPrefix(line, "0::"); ok {
			return strings.TrimSpace(group), nil
		}
	}
	return "", nil
}

func (l *Local) leave(pid int) error {
	all, err := l.Mounts()
	if err != nil {
		return err
	}
	err = fmt.Errorf("no hierarchy of version 2 is mounted")
	for _, m := range all {
		if m.Type != "cgroup2" || m.Root != "/" {
			continue
		}
		group := filepath.Join(m.Point, outliving)
		if err = os.Mkdir(group, 0o755); err == nil || os.IsExist(err) {
			err = os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
		}
		if err == nil {
			return nil
		}
	}
	return err
}
