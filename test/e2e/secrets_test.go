package e2e

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
)

// TestNoSecretIsInAnyLog at the highest verbosity of Quarry and its sidecars: not those of a domain, not
// those that CSI calls carry, not the controller's keys, and nobody's token.
func TestNoSecretIsInAnyLog(t *testing.T) {
	r := newRig(t)
	ofDomain, ofVolumes, ofEncrypted := "domain-"+rand.Text(), "volumes-"+rand.Text(), "passphrase-"+rand.Text()
	r.secret(system, "e2e-domain", "secrets.yaml", "password: "+ofDomain+"\n")
	r.secret(r.ns, "volumes", "encryptionPassphrase", ofVolumes)
	r.secret(r.ns, "encrypted", "encryptionPassphrase", ofEncrypted)

	r.helm("upgrade", release, "../../charts/quarry", "--reuse-values", "--set", "logLevel=10,sidecars.logLevel=10,secrets.xfs.secretName=e2e-domain", "--wait", "--timeout", "5m")
	r.Cleanup(func() {
		r.helm("rollback", release, "--wait", "--timeout", "5m")
		r.wait("the domains to be open again", r.settled)
	})
	r.wait("the domains to be open", r.settled)

	// A life with secrets in it. XFS grows in use everywhere.
	carries := r.class("volumes", "xfs", nil)
	r.claim(claim{name: "data", class: carries, size: "300Mi"})
	r.start(pod{name: "writer", claims: []string{"data"}})
	sum := r.write("writer", "/data/file")
	r.snapshot("s", "data")
	r.claim(claim{name: "restored", class: carries, size: "300Mi", from: fromSnapshot("s")})
	r.start(pod{name: "reader", claims: []string{"restored"}})
	r.holds("reader", "/data/file", sum)
	_, err := r.kube.CoreV1().PersistentVolumeClaims(r.ns).Patch(bg, "data", types.MergePatchType, []byte(`{"spec":{"resources":{"requests":{"storage":"400Mi"}}}}`), metav1.PatchOptions{})
	r.must(err)
	r.wait("the claim to have grown", func() (bool, error) {
		c, err := r.tryClaim("data")
		if err != nil {
			return false, err
		}
		have := c.Status.Capacity[corev1.ResourceStorage]
		return have.Value() >= bytesOf("400Mi"), fmt.Errorf("it has %s: %v", have.String(), c.Status.Conditions)
	})
	r.Logf("encrypted: %s", r.tryEncrypted(r.class("encrypted", "xfs", map[string]string{"encrypted": "true"})))
	r.stop("writer")
	r.stop("reader")

	logs := r.logs()
	keys := must(r.kube.CoreV1().Secrets(system).Get(bg, "quarry-controller-tls", metav1.GetOptions{}))(r).Data
	secrets := map[string]string{"the domain's": ofDomain, "the volumes'": ofVolumes, "the encrypted volume's": ofEncrypted,
		"the controller's key": middle(r, keys["tls.key"]), "its authority's key": middle(r, keys["ca.key"])}
	// What is no secret and was read in the same way shows that the logs say all, and that it would be found.
	known := middle(r, keys["ca.crt"])
	found := false
	for container, log := range logs {
		if !highest(log) {
			r.Errorf("%s does not say as much as it could", container)
		}
		for whose, secret := range secrets {
			if says(log, secret) {
				r.Errorf("%s: %s secret is in the log", container, whose)
			}
		}
		if token := aToken.Find(log); token != nil {
			r.Errorf("%s: a token is in the log: %.20s...", container, token)
		}
		found = found || strings.Contains(container, "quarry-controller") && says(log, known)
	}
	if !found {
		r.Error("the authority's certificate, which is no secret, was not found in the controllers' logs: a key would not have been found either")
	}
	// Containers of two controllers with five each, and one of each node.
	if want := 2*5 + len(r.nodes); len(logs) < want {
		r.Errorf("there are logs of %d containers, want %d", len(logs), want)
	}
	r.nowhereElse(secrets)
}

func (r *rig) helm(args ...string) {
	r.Helper()
	_, err := r.program(r.command, append([]string{"helm", "--namespace", system}, args...)...)
	r.must(err)
}

func (r *rig) secret(ns, name, key, value string) {
	r.Helper()
	secrets := r.kube.CoreV1().Secrets(ns)
	_, err := secrets.Create(bg, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, StringData: map[string]string{key: value}}, metav1.CreateOptions{})
	r.must(err)
	if ns != r.ns {
		r.Cleanup(func() { r.must(secrets.Delete(bg, name, metav1.DeleteOptions{})) })
	}
}

// class makes one whose volumes are staged, published and grown with a secret of the scenario's. That the
// chart's sidecars may read none leaves these: the kubelet reads them.
func (r *rig) class(secret, domain string, more map[string]string) string {
	r.Helper()
	parameters := map[string]string{"domain": domain, "csi.storage.k8s.io/fstype": "xfs"}
	for _, call := range []string{"node-stage", "node-publish", "node-expand"} {
		parameters["csi.storage.k8s.io/"+call+"-secret-name"] = secret
		parameters["csi.storage.k8s.io/"+call+"-secret-namespace"] = r.ns
	}
	for k, v := range more {
		parameters[k] = v
	}
	classes := r.kube.StorageV1().StorageClasses()
	c, err := classes.Create(bg, &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: r.ns + "-" + secret}, Provisioner: driver, Parameters: parameters,
		AllowVolumeExpansion: ptr.To(true), VolumeBindingMode: ptr.To(storagev1.VolumeBindingWaitForFirstConsumer)}, metav1.CreateOptions{})
	r.must(err)
	r.Cleanup(func() { r.must(classes.Delete(bg, c.Name, metav1.DeleteOptions{})) })
	return c.Name
}

// tryEncrypted uses an encrypted volume, or sees why it cannot be: nodes without dm-crypt.
func (r *rig) tryEncrypted(class string) string {
	r.Helper()
	r.claim(claim{name: "encrypted", class: class, size: "300Mi"})
	r.makePod(pod{name: "encrypted", claims: []string{"encrypted"}})
	defer r.stop("encrypted")
	seen := ""
	r.wait("an encrypted volume, or why there is none", func() (bool, error) {
		p, err := r.tryPod("encrypted")
		if err == nil && p.Status.Phase == corev1.PodRunning {
			seen = "used"
			return true, nil
		}
		for _, e := range r.events("PersistentVolumeClaim", "encrypted") {
			if e.Reason == "ProvisioningFailed" && strings.Contains(e.Message, "crypt") {
				seen = e.Message
				return true, nil
			}
		}
		return false, err
	})
	return seen
}

// logs are those of all containers of Quarry's, as their nodes have them, turned ones too.
func (r *rig) logs() map[string][]byte {
	r.Helper()
	out := map[string][]byte{}
	for _, node := range r.nodes {
		list := must(r.program(r.command, "exec", node, "find", "/var/log/pods", "-path", "/var/log/pods/"+system+"_*", "-type", "f"))(r)
		for _, file := range strings.Fields(list) {
			text := must(r.program(r.command, "exec", node, "zcat", "-f", file))(r)
			parts := strings.Split(strings.TrimPrefix(file, "/var/log/pods/"), "/") // namespace_pod_uid/container/file
			container := parts[0] + "/" + parts[1]
			out[container] = append(out[container], whole([]byte(text))...)
		}
	}
	return out
}

// whole takes off what the container runtime adds to lines, of which it makes several if they are long.
func whole(log []byte) []byte {
	var out []byte
	for line := range bytes.Lines(log) {
		fields := bytes.SplitN(line, []byte(" "), 4) // time, stream, P or F, text
		if len(fields) < 4 {
			out = append(out, line...)
			continue
		}
		text := fields[3]
		if string(fields[2]) == "P" {
			text = bytes.TrimSuffix(text, []byte("\n"))
		}
		out = append(out, text...)
	}
	return out
}

var (
	aToken = regexp.MustCompile(`eyJ[\w-]{10,}\.eyJ[\w-]{20,}\.[\w-]{20,}`)
	// wholeCall is all that a sidecar has to say while its controller does not lead and nobody answers.
	wholeCall = regexp.MustCompile(`"GRPC call" .*request="`)
	// dump is a line of what client-go prints of bodies that are no text.
	dump = regexp.MustCompile(`(?m)^\s*[0-9a-f]{8}  ((?:[0-9a-f]{2} {1,2}){1,16})\s*\|`)
)

// highest: client-go prints whole bodies, gRPC clients and servers whole calls.
func highest(log []byte) bool {
	return bytes.Contains(log, []byte("Response Body")) || bytes.Contains(log, []byte(`"Response"`)) || bytes.Contains(log, []byte("GRPC request")) ||
		bytes.Contains(log, []byte(`"Call" `)) || bytes.Contains(log, []byte(`"curl -`)) || wholeCall.Match(log)
}

// says whether a log has a text: as it is, as base64 wherever it stands in what was encoded, in
// hexadecimal, and each of these within a dump.
func says(log []byte, text string) bool {
	forms := []string{text, hex.EncodeToString([]byte(text))}
	for before := range 3 {
		encoded := base64.RawStdEncoding.EncodeToString(append(make([]byte, before), text...))
		// The first characters belong to what stands before, the last ones to what follows.
		forms = append(forms, encoded[(before*8+5)/6:len(encoded)-2])
	}
	var dumped []byte
	for _, m := range dump.FindAllSubmatch(bytes.ReplaceAll(log, []byte(`\n`), []byte("\n")), -1) {
		b, err := hex.DecodeString(string(bytes.ReplaceAll(m[1], []byte(" "), nil)))
		if err == nil {
			dumped = append(dumped, b...)
		}
	}
	for _, form := range forms {
		if bytes.Contains(log, []byte(form)) || bytes.Contains(dumped, []byte(form)) {
			return true
		}
	}
	return false
}

// middle of a PEM file is a line that no other has.
func middle(r *rig, pem []byte) string {
	r.Helper()
	lines := strings.Split(strings.TrimSpace(string(pem)), "\n")
	if len(lines) < 4 {
		r.Fatalf("a PEM file of %d lines", len(lines))
	}
	return lines[2]
}

// nowhereElse: no event, no object of the volumes, no tag and no command line has a secret in it.
func (r *rig) nowhereElse(secrets map[string]string) {
	r.Helper()
	events := must(r.kube.CoreV1().Events("").List(bg, metav1.ListOptions{}))(r)
	volumes := must(r.kube.CoreV1().PersistentVolumes().List(bg, metav1.ListOptions{}))(r)
	asked := must(r.program(r.quarry, "images", "-o", "json"))(r) + must(r.program(r.quarry, "domains", "-o", "json"))(r)
	told := append(append(must(json.Marshal(events))(r), must(json.Marshal(volumes))(r)...), asked...)
	for whose, secret := range secrets {
		if says(told, secret) {
			r.Errorf("%s secret is in an event, a PersistentVolume or what kubectl quarry says", whose)
		}
		for _, node := range r.nodes {
			for _, f := range folders {
				// grep ends with 1 when there is nothing, and with 2 when it could not look.
				out, err := r.program(r.command, "exec", node, "sh", "-c", "grep -rlF -- "+secret+" "+f+"/tags; [ $? -eq 1 ]")
				if err != nil {
					r.Errorf("%s secret is in a tag on %s: %s %v", whose, node, out, err)
				}
			}
			out, err := r.program(r.command, "exec", node, "sh", "-c", `for p in /proc/[0-9]*; do tr '\0' ' ' <$p/cmdline; echo; done 2>/dev/null; true`)
			r.must(err)
			for line := range strings.Lines(out) {
				if strings.Contains(line, secret) && !strings.Contains(line, "grep") {
					r.Errorf("%s secret is in a command line on %s: %s", whose, node, line)
				}
			}
		}
	}
}
