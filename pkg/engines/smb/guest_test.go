package smb

import (
	"os"
	"testing"
)

// What Linux 6.1.172 said: of user's session alone, and of a guest's beside it (Samba 4.17, map to guest = Bad Password).
func TestAGuestIsSeenInWhatTheKernelTells(t *testing.T) {
	for file, want := range map[string]bool{"user": false, "guest": true} {
		text, err := os.ReadFile("testdata/" + file)
		if err != nil {
			t.Fatal(err)
		}
		if got := guestIn(string(text), `\\127.0.0.1\K8S`); got != want {
			t.Errorf("%s: a guest uses the share: %v", file, got)
		}
		if guestIn(string(text), `\\127.0.0.1\other`) || guestIn(string(text), `\\127.0.0.2\k8s`) {
			t.Errorf("%s: a guest uses a share that nobody uses", file)
		}
	}
	if guestIn("", `\\127.0.0.1\k8s`) {
		t.Error("a guest is seen where nothing is told")
	}
}
