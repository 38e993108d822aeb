package main

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engines/share"
)

func sample(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Recorded with Linux 6.1.172, of a domain in which a volume had just been mounted.
func TestTheCallsOfAnNFSMountAreRead(t *testing.T) {
	got, err := ofNFS(sample(t, "mountstats-nfs3"), share.DefaultMounts)
	if err != nil {
		t.Fatal(err)
	}
	for kind, want := range map[string]int64{"NULL": 1, "GETATTR": 12, "LOOKUP": 160, "READ": 127, "WRITE": 74, "LINK": 11, "READDIR": 0, "COMMIT": 1} {
		if n, there := got[kind]; n != want || !there {
			t.Errorf("%s: %d (there: %t), not %d", kind, n, there, want)
		}
	}
	if len(got) != 22 || got.sum() != 634 {
		t.Errorf("%d kinds and %d calls were read, not 22 and 634: %v", len(got), got.sum(), got)
	}
}

// smbStats is written by hand in the form of Linux 6.1: replace it by a record of the real thing.
const smbStats = `Resources in use
CIFS Session: 1
Share (unique mount targets): 2
Operations (MIDs): 0

0 session 0 share reconnects
Total vfs operations: 310 maximum at one time: 3

Max requests in flight: 4
1) \\127.0.0.1\other
SMBs: 9
Bytes read: 0  Bytes written: 0
Open files: 0 total (local), 0 open on server
TreeConnects: 1 total 0 failed
Creates: 3 total 0 failed

2) \\127.0.0.1\k8s	DISCONNECTED
SMBs: 49
Bytes read: 4096  Bytes written: 8192
Open files: 2 total (local), 2 open on server
TreeConnects: 1 total 0 failed
Creates: 20 total 4 failed
Closes: 12 total 0 failed
QueryInfos: 16 total 0 failed
OplockBreaks: 0 sent 0 failed
`

func TestTheCommandsToAnSMBShareAreRead(t *testing.T) {
	got, err := ofSMB(smbStats, "k8s")
	want := requests{"TreeConnects": 1, "Creates": 20, "Closes": 12, "QueryInfos": 16, "OplockBreaks": 0}
	if err != nil || !maps.Equal(got, want) {
		t.Errorf("%v were read (%v), not %v", got, err, want)
	}
}

func TestAnUnknownMountOrShareIsAnError(t *testing.T) {
	nfs, smb := sample(t, "mountstats-nfs3"), smbStats
	for name, parse := range map[string]func() (requests, error){
		"no such mount":      func() (requests, error) { return ofNFS(nfs, "/elsewhere") },
		"a prefix of a name": func() (requests, error) { return ofNFS(nfs, strings.TrimSuffix(share.DefaultMounts, "s")) },
		"two mounts":         func() (requests, error) { return ofNFS(nfs+nfs, share.DefaultMounts) },
		"no such share":      func() (requests, error) { return ofSMB(smb, "k9s") },
		"two connections":    func() (requests, error) { return ofSMB(smb+smb, "k8s") },
		"nothing":            func() (requests, error) { return ofSMB("", "k8s") },
	} {
		if got, err := parse(); err == nil {
			t.Errorf("%s: %v was read", name, got)
		}
	}
}

func TestRequestsAreCompared(t *testing.T) {
	before, now := requests{"READ": 3, "WRITE": 1}, requests{"READ": 3, "WRITE": 8, "GETATTR": 20, "COMMIT": 7}
	made := now.since(before)
	if want := (requests{"WRITE": 7, "GETATTR": 20, "COMMIT": 7}); !maps.Equal(made, want) {
		t.Errorf("%v were made, not %v", made, want)
	}
	if all, some := made.sum(), made.sum("WRITE", "COMMIT"); all != 34 || some != 14 {
		t.Errorf("they are %d, and %d of some kinds", all, some)
	}
	if top := made.top(2); top != "20 GETATTR, 7 COMMIT" {
		t.Errorf("the most are %q", top)
	}
	if got, want := median([]requests{{"A": 1, "B": 5}, {"A": 9}, {"A": 3, "C": 1}}), (requests{"A": 3}); !maps.Equal(got, want) {
		t.Errorf("the median is %v, not %v", got, want)
	}
}
