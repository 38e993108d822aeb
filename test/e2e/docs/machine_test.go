package docs

import (
	"strings"
	"testing"
)

const (
	others   = "a target of its own"
	inTheLab = "it needs device-mapper: cmd/quarry runs it in the kernel lab"
)

// TestTheCommandsOfREADME: Quarry on a directory of one machine.
func TestTheCommandsOfREADME(t *testing.T) {
	r := onAMachine(t)
	const (
		start = "bin/quarry standalone --domains domains.yaml"
		ask   = "bin/kubectl-quarry domains"
	)
	not := map[string]string{}
	for _, target := range []string{"demo", "test", "help", "e2e", "image", "sanity", "crash", "bench", "lint"} {
		not["make "+target] = others
	}
	for _, program := range []string{"kubectl quarry", "quarry standalone"} {
		not[program] = "the text names the program"
	}
	r.follow("README.md", given{
		before: map[string]func(){ask: func() { r.answers(ask) }},
		after: map[string]func(string){ask: func(said string) {
			if !strings.Contains(said, "local") {
				r.Errorf("it says %s", said)
			}
			r.stopStandalone()
		}},
		other:  map[string][2]string{start: background(start)},
		not:    not,
		blocks: map[string]string{"flowchart": "a picture"},
	})
}

// TestTheCommandsOfOPERATIONSForOneMachine; what it says of Kubernetes is run on a cluster.
func TestTheCommandsOfOPERATIONSForOneMachine(t *testing.T) {
	r := onAMachine(t)
	const start = "quarry standalone"
	r.sh("CGO_ENABLED=0 go build -buildvcs=false -o bin/ ./cmd/quarry")
	r.env = append(r.env, "KUBECONFIG=")
	for i, v := range r.env {
		if path, ok := strings.CutPrefix(v, "PATH="); ok {
			r.env[i] = "PATH=" + r.checkout + "/bin:" + path
		}
	}
	elsewhere := "in Kubernetes: it is run there"
	r.follow("docs/OPERATIONS.md", given{
		before: map[string]func(){
			"mkdir -p /srv/quarry/import":                                        func() { r.answers("kubectl quarry domains") },
			"cp --reflink=auto --sparse=always old/disk.img /srv/quarry/import/": func() { r.sh("mkdir old && truncate -s 64M old/disk.img && mkfs.ext4 -q old/disk.img") },
		},
		after: map[string]func(string){
			"kubectl quarry import legacy --domain local --source disk.img": func(string) { r.stopStandalone() },
		},
		other: map[string][2]string{start: background(start)},
		not: map[string]string{
			"kubectl quarry import ... --claim shop/data -o yaml | kubectl apply -f -": elsewhere,
			"kubectl quarry domains": "it is asked before each import",
			"kubectl quarry":         "the text names the program",
			"quarry engine":          "the text names the program",
			"quarry controller":      "the text names the program",
			"quarry node":            "the text names the program",
		},
		sections: map[string]string{
			"Looking and mending: kubectl quarry": elsewhere, "Controller and agents": elsewhere, "When the file changes": elsewhere, "Which way an operation takes": elsewhere,
			"A logical volume":                  inTheLab,
			"Engines in processes of their own": "cmd/quarry and test/python run them",
			"Errors and what to do":             elsewhere, "Events in Kubernetes": elsewhere,
		},
		blocks: operationsBlocks(),
	})
}

// background is how a program that runs until it is stopped is started.
func background(command string) [2]string {
	return [2]string{command + " >standalone.log 2>&1 & echo $! >standalone.pid", "it runs until it is stopped"}
}

func (r *reader) answers(script string) {
	r.Helper()
	r.wait("Quarry to answer", func() error { _, err := r.try(script); return err })
}

func (r *reader) stopStandalone() {
	r.Helper()
	r.sh("kill $(cat standalone.pid)")
	r.wait("Quarry to end", func() error { _, err := r.try("! kill -0 $(cat standalone.pid) 2>/dev/null"); return err })
	if log := r.sh("cat standalone.log"); !strings.Contains(log, "Stopped") {
		r.Errorf("it did not end as it should:\n%s", log)
	}
}
