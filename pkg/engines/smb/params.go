package smb

import (
	"maps"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/quarry-csi/quarry/pkg/engines/share"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// Params are the parameters of a domain of this type, with one line of help each.
func Params() map[string]string {
	return map[string]string{
		"server":  "name or address of the server, with \":port\" where that is not 445 (required)",
		"share":   "name of the share (required)",
		"folder":  "folder of the share that is the domain, as in \"k8s/prod\"; made where it is missing (default: the share's root)",
		"version": "version of the protocol: " + strings.Join(versions(), ", ") + " (default: the highest that the server has)",
		"options": "mount options for all of the domain, separated by commas, as in \"seal,rsize=1048576\" (default: none)",
	}
}

// Secrets are the secrets of a domain of this type, with one line of help each.
func Secrets() map[string]string {
	return map[string]string{
		"username": "user at the server, without domain (required)",
		"password": "the user's password (required)",
		"domain":   "domain or workgroup of the user (default: the server's own users)",
	}
}

// What the kernel and the protocol have room for, in bytes; see fs/smb/client/cifsglob.h.
const (
	maxUsername = 256
	maxPassword = 512
	maxDomain   = 255
	maxShare    = 80
	maxFolder   = 512
)

const defaultPort = 445

// settings are the checked parameters and secrets of a domain.
type settings struct {
	host    string // name or address, without brackets
	port    uint16
	share   string
	folder  string // "" is the root
	dialect dialect
	options []string
	user    string
	pass    *host.Secret // fmt would show the text itself, since the field is not exported
	domain  string
}

// check verifies parameters and secrets. The error is fault.Invalid, and shows no secret.
func check(params, secrets map[string]string) (s settings, err error) {
	if err := known("parameter", params, Params()); err != nil {
		return s, err
	}
	if err := known("secret", secrets, Secrets()); err != nil {
		return s, err
	}
	if s.host, s.port, err = checkServer(params["server"]); err != nil {
		return s, err
	}
	if s.share, err = checkShare(params["share"]); err != nil {
		return s, err
	}
	if s.folder, err = checkFolder(params["folder"]); err != nil {
		return s, err
	}
	if s.dialect, err = parseVersion(params["version"]); err != nil {
		return s, err
	}
	if o := params["options"]; o != "" {
		s.options = strings.Split(o, ",")
	}
	if err := checkDomainOptions(s.options, s.dialect); err != nil {
		return s, fault.New(fault.Invalid, "parameter \"options\": %w", err)
	}
	for name, most := range map[string]int{"username": maxUsername, "password": maxPassword, "domain": maxDomain} {
		if err := checkSecret(name, secrets[name], most); err != nil {
			return s, err
		}
	}
	if strings.ContainsAny(secrets["username"], `\/`) {
		return s, fault.New(fault.Invalid, "secret \"username\" contains a slash or backslash: the domain has a secret of its own, \"domain\"")
	}
	pass := host.Secret(secrets["password"])
	s.user, s.pass, s.domain = secrets["username"], &pass, secrets["domain"]
	return s, nil
}

// known refuses names that are not in help. No value is shown.
func known(what string, given, help map[string]string) error {
	names := slices.Sorted(maps.Keys(help))
	for _, name := range slices.Sorted(maps.Keys(given)) {
		if !slices.Contains(names, name) {
			return fault.New(fault.Invalid, "%s %q is unknown: engine smb knows %s", what, name, strings.Join(names, ", "))
		}
	}
	return nil
}

// hostname is what a name in DNS or in a hosts file may be.
const hostname = `^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_.])?$`

func checkServer(server string) (host string, port uint16, err error) {
	wrong := fault.New(fault.Invalid, "parameter \"server\" is %q: the name or the address of a server is needed, and \":port\" where that is not %d", server, defaultPort)
	host, port = server, defaultPort
	if inner, ok := strings.CutPrefix(server, "["); ok && strings.HasSuffix(inner, "]") {
		host = strings.TrimSuffix(inner, "]")
	} else if h, p, err := net.SplitHostPort(server); err == nil {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			return "", 0, wrong
		}
		host, port = h, uint16(n)
	}
	if a, err := netip.ParseAddr(host); err == nil && a.Zone() == "" {
		return a.Unmap().String(), port, nil
	}
	if !regexp.MustCompile(hostname).MatchString(host) {
		return "", 0, wrong
	}
	return host, port, nil
}

// refusedInNames are the characters that no share and no file can have in its name; see
// [MS-FSCC] 2.1.5.
const refusedInNames = `"\/[]:|<>+=;,*?`

func checkShare(share string) (string, error) {
	switch {
	case share == "":
		return "", fault.New(fault.Invalid, "parameter \"share\" is missing: the name of a share is needed, as in \"k8s\"")
	case strings.ContainsAny(share, `\/`):
		return "", fault.New(fault.Invalid, "parameter \"share\" is %q: the name alone is needed, without the server; a folder of the share is the parameter \"folder\"", share)
	case len(share) > maxShare || strings.ContainsAny(share, refusedInNames) || unprintable(share) || strings.TrimSpace(share) != share:
		return "", fault.New(fault.Invalid, "parameter \"share\" is %q: 1 to %d bytes are allowed, without blanks around them and without any of %s", share, maxShare, refusedInNames)
	case strings.EqualFold(share, "IPC$"):
		return "", fault.New(fault.Invalid, "parameter \"share\" is %q, which holds no files", share)
	}
	return share, nil
}

func checkFolder(folder string) (string, error) {
	folder, err := share.Folder(folder)
	if err != nil || folder == "" {
		return "", err
	}
	wrong := func(why string) (string, error) {
		return "", fault.New(fault.Invalid, "parameter \"folder\" is %q: %s; a path below the share's root is needed, as in \"k8s/prod\"", folder, why)
	}
	if len(folder) > maxFolder || unprintable(folder) {
		return wrong("it is too long, or has characters that cannot be printed")
	}
	for part := range strings.SplitSeq(folder, "/") {
		switch {
		case len(part) > 255 || strings.ContainsAny(part, `":|<>*?`):
			return wrong(`a part of it is too long, or has one of ":|<>*?`)
		case strings.TrimRight(part, ". ") != part || strings.TrimLeft(part, " ") != part:
			return wrong("a part of it begins with a blank, or ends with a blank or a dot, which servers drop")
		}
	}
	return folder, nil
}

func unprintable(s string) bool {
	return !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

// checkSecret says what is wrong with a secret, and nothing of what is in it.
func checkSecret(name, value string, most int) error {
	switch {
	case value == "" && name != "domain":
		return fault.New(fault.Invalid, "secret %q is missing: user and password are needed (secretsFile), nothing is shared with guests", name)
	case len(value) > most:
		return fault.New(fault.Invalid, "secret %q is too long: at most %d bytes are allowed", name, most)
	case unprintable(value):
		return fault.New(fault.Invalid, "secret %q has a character that cannot be printed, such as a line break at its end", name)
	}
	return nil
}

// Place is where the storage of checked params is: server, share and folder in lower case, since
// servers ignore case; "" where they cannot be read.
func Place(params map[string]string) string {
	name, port, err := checkServer(params["server"])
	folder, errFolder := checkFolder(params["folder"])
	if err != nil || errFolder != nil || params["share"] == "" {
		return ""
	}
	return strings.ToLower("smb://" + net.JoinHostPort(strings.TrimSuffix(name, "."), strconv.Itoa(int(port))) + "/" + params["share"] + "/" + folder)
}
