package smb

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/test/lab"
	"github.com/quarry-csi/quarry/test/lab/samba"
)

// mustRefuse expects that a domain does not open, of a kind, with words, without a secret, soon, and
// that nothing stays mounted.
func mustRefuse(t *testing.T, params, secrets map[string]string, kind fault.Kind, says ...string) {
	t.Helper()
	mounts := t.TempDir()
	begin := time.Now()
	e, err := Open(t.Context(), params, secrets, host.NewLocal(host.Exec{}), mounts)
	if err == nil {
		must(t, e.Close())
		t.Fatal("it opens")
	}
	if took := time.Since(begin); took > 30*time.Second {
		t.Errorf("it took %s", took)
	}
	if !errors.Is(err, kind) {
		t.Errorf("the error is %v, not %v: %v", fault.KindOf(err), kind, err)
	}
	for _, word := range says {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("the error does not say %q: %v", word, err)
		}
	}
	if strings.Contains(err.Error(), secrets["password"]) {
		t.Errorf("the error shows the password: %v", err)
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	if strings.Contains(string(table), mounts) {
		t.Errorf("something stays mounted:\n%s", table)
	}
}

func with(m map[string]string, name, value string) map[string]string {
	m[name] = value
	return m
}

func TestLabWrongInputIsToldPrecisely(t *testing.T) {
	lab.Need(t)
	disk := hosttest.Filesystem(t, "ext4", 1<<30)
	folder := func(name string) string {
		path := filepath.Join(disk, name)
		must(t, os.Mkdir(path, 0o755))
		return path
	}
	s := samba.Start(t, []string{"server max protocol = SMB3_02", "smb encrypt = off"},
		samba.Share{Name: "k8s", Path: folder("k8s")},
		samba.Share{Name: "ro", Path: folder("ro"), Lines: []string{"read only = yes"}},
		samba.Share{Name: "others", Path: folder("others"), Lines: []string{"valid users = root"}},
		samba.Share{Name: "shouting", Path: folder("shouting"), Lines: []string{"preserve case = no", "short preserve case = no", "default case = upper"}},
		samba.Share{Name: "roots", Path: folder("roots")},
	)
	must(t, os.Chown(filepath.Join(disk, "roots"), 0, 0))
	params := func() map[string]string { return map[string]string{"server": s.Address(), "share": "k8s"} }
	for _, c := range []struct {
		name            string
		params, secrets map[string]string
		kind            fault.Kind
		says            []string
	}{
		{"no such host", with(params(), "server", "nas.invalid"), secrets(), fault.Unavailable, []string{`"nas.invalid"`, "resolved"}},
		{"nobody listens", with(params(), "server", "127.0.0.1:1"), secrets(), fault.Unavailable, []string{"connection refused"}},
		{"no such share", with(params(), "share", "nope"), secrets(), fault.Invalid, []string{"//127.0.0.1/nope", "no such share"}},
		{"no such share, with a folder", with(with(params(), "share", "nope"), "folder", "a/b"), secrets(), fault.Invalid, []string{"no such share"}},
		{"wrong password", params(), with(secrets(), "password", "wrong,one"), fault.Permission, []string{`user "backup"`, "password"}},
		{"wrong user", params(), with(secrets(), "username", "eve"), fault.Permission, []string{`user "eve"`}},
		{"another's share", with(params(), "share", "others"), secrets(), fault.Permission, []string{"others", "may not use the share"}},
		{"read-only share", with(params(), "share", "ro"), secrets(), fault.Permission, []string{"read-only"}},
		{"another's folder", with(params(), "share", "roots"), secrets(), fault.Permission, []string{"may not write"}},
		{"version", with(params(), "version", "3.1.1"), secrets(), fault.Invalid, []string{"does not offer SMB 3.1.1"}},
		{"no encryption", with(params(), "options", "seal"), secrets(), fault.Invalid, []string{"seal"}},
		{"names in upper case", with(params(), "share", "shouting"), secrets(), fault.Invalid, []string{"is not among them"}},
	} {
		t.Run(c.name, func(t *testing.T) { mustRefuse(t, c.params, c.secrets, c.kind, c.says...) })
	}
	t.Run("nothing is wrong", func(t *testing.T) {
		e, err := Open(t.Context(), params(), secrets(), host.NewLocal(host.Exec{}), t.TempDir())
		must(t, err)
		must(t, e.Close())
	})
}

func TestLabAGuestIsRefused(t *testing.T) {
	r := newRig(t, "ext4", []string{"map to guest = Bad Password", "guest account = " + samba.User}, "guest ok = yes")
	mustRefuse(t, r.params(nil), with(secrets(), "password", "wrong,one"), fault.Permission, "guest")
}

func TestLabAServerThatIsSilentIsGivenUpInSeconds(t *testing.T) {
	r := newRig(t, "ext4", nil)
	r.Freeze(t)
	defer r.Thaw(t)
	mustRefuse(t, r.params(nil), secrets(), fault.Unavailable, "does not answer")
}

func TestLabThePasswordIsNowhereToBeSeen(t *testing.T) {
	r := newRig(t, "ext4", nil)
	e := r.open(t, "", "")
	ctx := t.Context()
	must(t, e.CreateSlab(ctx, engine.SlabSpec{ID: "tree", Kind: engine.Tree, Size: 1 << 20}))
	_, err := e.AttachSlab(ctx, "tree", engine.AttachOptions{MountOptions: []string{"uid=1000"}})
	must(t, err)
	defer e.DetachSlab(ctx, "tree")
	for _, file := range []string{"/proc/self/mountinfo", "/proc/self/mounts", "/proc/self/cmdline", "/proc/fs/cifs/DebugData"} {
		content, err := os.ReadFile(file)
		must(t, err)
		if strings.Contains(string(content), "pass") {
			t.Errorf("%s has something of the password in it:\n%s", file, content)
		}
	}
	if log := kernelLog(t); strings.Contains(log, samba.Password) {
		t.Errorf("the kernel's log shows the password:\n%s", log)
	}
}

func kernelLog(t *testing.T) string {
	t.Helper()
	buf := make([]byte, 1<<20)
	n, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, buf)
	must(t, err)
	return string(buf[:n])
}
