// Package domain reads the domains file and opens what it names.
//
// The file is YAML and strict: what is not known is refused, with the line,
// the field's path and what is known.
//
//	domains:
//	- name: local                # a DNS label: the beginning of every handle
//	  engine: dir                # a key of the Registry
//	  process: true              # the engine has a process of its own
//	  socket: /run/x/engine.sock # or is somebody else's process, of any type
//	  params:                    # strings, as the engine declares them
//	    path: /srv/quarry
//	  defaults: allow            # or native-only: no capability by default work
//	  scope: node                # or shared; the engine's own unless said
//	  overcommit: 1.0            # how many times the capacity may be promised
//	  capacityLimit: 100Gi       # a Kubernetes quantity or bytes
//	  backgroundRate: 50Mi       # bytes per second
//	  secretsFile: secrets.yaml  # a map of strings, mode 0600 (0440 in a pod), beside this file
//	  aliases: [old-name]        # former names, whose handles stay valid
//	  takeOver: false            # from another installation
package domain
