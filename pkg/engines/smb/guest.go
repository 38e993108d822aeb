package smb

import (
	"os"
	"regexp"
	"strings"
)

// sessions is where the kernel's client tells what it has open at which server, and as whom.
const sessions = "/proc/fs/cifs/DebugData"

// asGuest says whether the server let this node use the share as a guest: then a wrong password is
// as good as the right one, and anybody may change what is there. A kernel that does not tell is
// believed to be the user it was told to be.
func (v *volume) asGuest() bool {
	text, err := os.ReadFile(sessions)
	return err == nil && guestIn(string(text), `\\`+v.host+`\`+v.share)
}

// guestIn says whether a share (\\server\name) is among those of a guest's session.
func guestIn(text, share string) bool {
	session := regexp.MustCompile(`^\t\d+\) (Address|Name): .*`)
	tree := regexp.MustCompile(`^\t\d+\) (\\\\.*) Mounts: \d+`)
	guest := false
	for line := range strings.Lines(text) {
		if session.MatchString(line) {
			guest = strings.HasSuffix(strings.TrimSpace(line), " Guest") || strings.HasSuffix(strings.TrimSpace(line), " Anonymous")
		} else if m := tree.FindStringSubmatch(line); m != nil && guest && strings.EqualFold(m[1], share) {
			return true
		}
	}
	return false
}
