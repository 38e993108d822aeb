package smb

import (
	"fmt"
	"testing"
)

func TestAClassMayChooseWhatItsUsersSee(t *testing.T) {
	for _, o := range []string{
		"uid=1000", "gid=1000", "forceuid", "forcegid", "file_mode=0660", "dir_mode=2770", "mfsymlinks", "nobrl", "seal", "sign",
		"cache=none", "cache=strict", "actimeo=0", "rsize=65536", "wsize=65536", "noperm", "hard", "serverino", "cifsacl",
	} {
		if err := checkClassOptions([]string{o}, 0); err != nil {
			t.Errorf("%s is refused: %v", o, err)
		}
	}
}

func TestOptionsThatLoseDataOrTellSecretsAreRefusedWithTheReason(t *testing.T) {
	for option, says := range map[string]string{
		"soft":               "data are lost",
		"cache=loose":        "see what other nodes write",
		"cache=ro":           "see what other nodes write",
		"cache=singleclient": "see what other nodes write",
		"nostrictsync":       "fsync would return before",
		"noserverino":        "two names of one file",
		"fsc":                "another node has already changed",
		"username=eve":       "secretsFile",
		"password=" + hidden: "secretsFile",
		"pass=" + hidden:     "secretsFile",
		"credentials=/etc/x": "secretsFile",
		"domain=LAB":         "secretsFile",
		"guest":              "anybody could change it",
		"multiuser":          "domain's user",
		"vers=1.0":           `parameter "version"`,
		"sec=none":           "NTLMv2",
		"ip=10.0.0.2":        "params",
		"prefixpath=../x":    "params",
		"frobnicate":         "unknown or not allowed",
		"file_mode=rwx":      "has to match",
		"uid=root":           "has to match",
		"seal=yes":           "takes no value",
		"uid=1,soft":         "has to match",
		"":                   "unknown or not allowed",
	} {
		t.Run(fmt.Sprintf("%.12q", option), func(t *testing.T) {
			judge(t, checkClassOptions([]string{"seal", option}, 0), says)
		})
	}
}

func TestADomainTakesNoOptionsOfClasses(t *testing.T) {
	for option, says := range map[string]string{
		"uid=1000":    "mountOptions of a class",
		"nobrl":       "always has it",
		"cache=loose": "nothing of a domain is cached",
		"soft":        "data are lost",
	} {
		judge(t, checkDomainOptions([]string{option}, 0), says)
	}
	judge(t, checkDomainOptions([]string{"seal", "sign", "wsize=65536", "max_channels=4"}, 0), "")
}

func TestEncryptionNeedsVersionThree(t *testing.T) {
	judge(t, checkDomainOptions([]string{"seal"}, smb210), "version 3.0 or higher")
	judge(t, checkClassOptions([]string{"seal"}, smb210), "version 3.0 or higher")
	judge(t, checkClassOptions([]string{"seal"}, smb300), "")
}
